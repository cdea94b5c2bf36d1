"""What `check_rates.py` checks, and its tables."""
