"""The verbs of the command line: which there are, and in which file each stands; a file is imported when its verb is called."""

# panels of the overview, each with its verbs; a verb's function has its name
PANELS = {
    "The line": ("run", "sweep", "data", "train", "export"),
    "Serving": ("hardware", "plan", "serve", "status", "ps", "logs", "stop", "warmup"),
    "Proof": ("verify", "certify", "check", "report", "parity", "render", "modelfile"),
    "Operating": ("gateway", "status-api", "config", "models", "choose", "doctor", "compose", "systemd", "kubernetes"),
    "Runs": ("runs", "prune"),
    "Publishing": ("card", "push"),
}
_SHARED = {
    "train": ("export",),
    "plan": ("hardware",),
    "serve": ("status",),
    "runs": ("ps", "logs", "stop", "prune"),
    "operate": ("warmup", "config", "models", "choose", "doctor"),
    "verify": ("report",),
    "certify": ("card", "push"),
    "kubernetes": ("check",),
    "prompts": ("parity", "render", "modelfile"),
    "deploy": ("gateway", "status-api", "compose", "systemd"),
}
# verb -> file: its own name, unless it stands in another's
FILES = {verb: verb for verbs in PANELS.values() for verb in verbs}
FILES |= {verb: file for file, verbs in _SHARED.items() for verb in verbs}
