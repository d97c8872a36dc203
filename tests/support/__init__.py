"""What the tests stand on: servers, RUNs, models and trainings of their own. No test is here."""
