"""Workflows: the operations that their nodes call, their files, and what is wrong with them.

Shared by gateways, control, the command line and tests: no tensor, no picture and no broker here.
"""
