"""The inference service: HTTP front door, batching, engine and the policies that guard its answers."""
