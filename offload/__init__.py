"""The offload core: imports torch, never a host, a server or a node."""
