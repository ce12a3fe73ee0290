"""Speaking to servers: the client, which addresses may be reached, and this machine's own."""
