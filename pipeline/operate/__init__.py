"""What runs in daily use: registry, observer, routing, gateway, status API."""
