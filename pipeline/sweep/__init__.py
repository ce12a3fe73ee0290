"""Many runs of the line at once: a spec, its runs on this machine or on a Ray cluster, and one page about all of them."""
