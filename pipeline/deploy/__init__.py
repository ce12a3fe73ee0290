"""What runs the servers elsewhere, made from the same plans: compose files, systemd units, Kubernetes manifests."""
