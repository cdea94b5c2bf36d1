"""One thin module per command. No logic of its own: what a command does is in the package it calls."""
