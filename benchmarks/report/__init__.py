"""From files of results to tables and pictures."""
