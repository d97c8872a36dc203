"""Object stores: local folders, S3, Google Cloud Storage and Azure. Objects are written whole."""
