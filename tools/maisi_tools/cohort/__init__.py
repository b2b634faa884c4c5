"""Many CT + mask pairs from one specification."""
