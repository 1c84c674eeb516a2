"""Networks, strangers to chains and schedules."""
