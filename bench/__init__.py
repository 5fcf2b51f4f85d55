"""Measurements of mcrelay, over networks of the lab."""
