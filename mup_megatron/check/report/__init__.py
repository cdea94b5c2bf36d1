"""Tells a verdict.

report.py         in words, as JSON and as CSV
picture.py        as one picture
panels.py         the panels of it
"""
