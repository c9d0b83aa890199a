"""Prefect flows, each readable as the picture in the README."""
