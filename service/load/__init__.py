"""Load on a running service: what is sent, and the clients that send it and note what happened."""
