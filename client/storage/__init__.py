"""Object stores: folders, S3, Google and Azure, read and written whole."""
