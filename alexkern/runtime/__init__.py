"""The one door to the device: backend choice, launches, configurations, layout rules."""
