"""Properties that hold for every model and every setup."""
