"""Reports of load tests: one run or several beside each other, as a table, JSON, CSV and one HTML page."""
