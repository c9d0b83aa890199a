"""Objectives. This room needs torch only."""
