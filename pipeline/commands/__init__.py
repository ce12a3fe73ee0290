"""The verbs of the command line: which there are, and in which file each stands; a file is imported when its verb is called."""

# panel of the overview -> verb -> file; the verb's function has its name
PANELS = {
    "The line": {"run": "run", "data": "data", "train": "train", "export": "train"},
    "Serving": {
        **{"hardware": "plan", "plan": "plan", "serve": "serve", "status": "serve"},
        **{"ps": "runs", "logs": "runs", "stop": "runs", "warmup": "operate"},
    },
    "Proof": {
        **{"verify": "verify", "certify": "certify", "report": "verify"},
        **{"parity": "prompts", "render": "prompts", "modelfile": "prompts"},
    },
    "Operating": {
        **{"gateway": "deploy", "status-api": "deploy", "config": "operate", "models": "operate", "choose": "operate"},
        **{"doctor": "operate", "compose": "deploy", "systemd": "deploy"},
    },
    "Runs": {"runs": "runs", "prune": "runs"},
    "Publishing": {"card": "certify", "push": "certify"},
}
