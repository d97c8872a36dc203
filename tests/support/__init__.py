"""What the tests share: servers, RUNs, models and trainings made for tests. No test is here."""
