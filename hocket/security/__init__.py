"""Who may do what: certificates and their roles, the broker's permissions, API keys.

Everything is off until a folder of certificates is named (`tls_dir`): on the loopback of one
machine nothing needs it. `hocket certs` makes all folders at once.
"""
