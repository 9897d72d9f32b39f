"""Configurations: default.py has every key, the other files change some of them."""
