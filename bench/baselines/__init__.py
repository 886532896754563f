"""Policies that others are compared with.

They run live, too, by name: entry points of the group `hocket.policies` lead to `named`.
"""
