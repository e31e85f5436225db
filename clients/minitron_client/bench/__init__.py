"""Load: schedules, requests, records, and the figures that come of them."""
