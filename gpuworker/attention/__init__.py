"""Attention over tokens that several workers hold."""
