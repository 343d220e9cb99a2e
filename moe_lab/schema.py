"""What the lab knows of its own configs and health does not: handed to `health.preflight` by the command line."""

# dead_keys: of the case and of its relatives, what looks like a knob and nothing reads (B20), and what is read instead
HEALTH_SCHEMA = {
    "sections": ("model", "training", "optimizer", "precision", "data"),
    "dead_keys": {
        "training.weight_decay": "optimizer.weight_decay",
        "training.lr": "training.max_lr",
        "training.learning_rate": "training.max_lr",
        "model.capacity_factor": "model.moe_capacity_factor",
        "model.expert_capacity_factor": "model.moe_capacity_factor",
        "model.moe.capacity_factor": "model.moe_capacity_factor",
        "model.mod.capacity_factor": "model.mod_capacity_factor",
        "optimizer.newton_iters": "optimizer.ns_steps",
        "optimizer.muon.newton_iters": "optimizer.ns_steps",
        "optimizer.muon.nesterov": "optimizer.nesterov",
        "training.nesterov": "optimizer.nesterov",
        "training.dtype": "precision.parameters and precision.compute",
        "training.mixed_precision": "precision.compute",
    },
}
