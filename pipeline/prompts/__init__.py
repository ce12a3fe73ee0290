"""From a conversation to the exact prompt, by every renderer, and where they differ."""
