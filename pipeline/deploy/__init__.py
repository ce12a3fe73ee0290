"""What runs the services elsewhere: docker compose files and systemd units, made from plans."""
