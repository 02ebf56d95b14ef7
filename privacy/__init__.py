"""Encryption, keys and differential privacy."""
