"""Talking to the inside of a guest: who it is, how it is told, and when it is ready."""
