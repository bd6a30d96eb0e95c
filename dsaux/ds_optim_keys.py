"""Table of the optimizers and learning-rate schedules of DeepSpeed 0.19.8, each parameter with its rule.

Second half of `dsaux.ds_keys`; used by `dsaux.config_deepspeed`, which asks PyTorch itself for a parameter of
its optimizers that does not stand here. A contract test compares these tables with both libraries.
"""

from __future__ import annotations

from collections.abc import Mapping

from dsaux.config_rules import Rule

_FLAG = Rule("flag")
_FLAG_OR_NULL = Rule("flag", null=True)
_LARGEST = 3e38  # float32, in which the weights are stepped, ends there
_POSITIVE = Rule("number", low=0, open_low=True, high=_LARGEST)
_NOT_NEGATIVE = Rule("number", low=0, high=_LARGEST)
_BELOW_ONE = Rule("number", low=0, high=1, open_high=True)

# Optimizers of torch.optim and their parameters. Names as written there: DeepSpeed looks them up with
# getattr, so "sgd" would find a module.
TORCH_OPTIMIZERS: Mapping[str, tuple[str, ...]] = {
    "ASGD": ("lr", "lambd", "alpha", "t0", "weight_decay"),
    "Adadelta": ("lr", "rho", "eps", "weight_decay"),
    "Adafactor": ("lr", "beta2_decay", "eps", "d", "weight_decay"),
    "Adagrad": ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
    "Adam": ("lr", "betas", "eps", "weight_decay", "amsgrad"),
    "AdamW": ("lr", "betas", "eps", "weight_decay", "amsgrad"),
    "Adamax": ("lr", "betas", "eps", "weight_decay"),
    "NAdam": ("lr", "betas", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay"),
    "RAdam": ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay"),
    "RMSprop": ("lr", "alpha", "eps", "weight_decay", "momentum", "centered"),
    "Rprop": ("lr", "etas", "step_sizes"),
    "SGD": ("lr", "momentum", "dampening", "weight_decay", "nesterov"),
}
TORCH_PARAMS_OF_ALL: tuple[str, ...] = ("foreach", "maximize")

_ADAM_PARAMS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "bias_correction", "set_grad_none")
_ADAM_SWITCHES = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")

# DeepSpeed's own optimizers, found whatever the letter case, and what their "params" may hold.
DEEPSPEED_OPTIMIZERS: Mapping[str, tuple[str, ...]] = {
    "Adam": _ADAM_PARAMS + _ADAM_SWITCHES,
    "AdamW": _ADAM_PARAMS + _ADAM_SWITCHES,
    "Lamb": (
        "lr",
        "bias_correction",
        "betas",
        "eps",
        "eps_inside_sqrt",
        "weight_decay",
        "max_coeff",
        "min_coeff",
        "amsgrad",
    ),
    "Lion": ("lr", "betas", "weight_decay", "set_grad_none"),
}
OPTIMIZER_SWITCHES: tuple[str, ...] = _ADAM_SWITCHES

_MUP = "it needs a model with mup base shapes, which dsaux models do not have. Use Adam, AdamW or SGD."
REFUSED_OPTIMIZERS: Mapping[str, str] = {
    "LBFGS": "it calls the model again inside a step, which a pipeline schedule cannot do. Use SGD or AdamW.",
    "SparseAdam": "it takes sparse gradients only, and these networks have dense ones. Use Adam.",
    "Muon": "DeepSpeed 0.19.8 cannot step the weight of a convolution with it, and every network here has some."
    " Use SGD or AdamW.",
    "MuAdam": _MUP,
    "MuAdamW": _MUP,
    "MuSGD": _MUP,
}

# DeepSpeed takes these as tested with ZeRO; all others need zero_allow_untested_optimizer.
ZERO_TESTED_OPTIMIZERS: tuple[str, ...] = ("Adam", "AdamW", "Adagrad", "Lion")

# DeepSpeed's CPU backend has no such operation.
GPU_OPTIMIZERS: tuple[str, ...] = ("Lamb", "Lion")

OPTIMIZER_PARAM_RULES: Mapping[str, Rule] = {
    "lr": _POSITIVE,
    "momentum": _BELOW_ONE,
    "dampening": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "betas": Rule("pair", low=0, high=1, open_high=True),
    "eps": _NOT_NEGATIVE,
    "alpha": _BELOW_ONE,
    "rho": Rule("number", low=0, high=1),
    "lambd": _NOT_NEGATIVE,
    "t0": _NOT_NEGATIVE,
    "lr_decay": _NOT_NEGATIVE,
    "initial_accumulator_value": _NOT_NEGATIVE,
    "momentum_decay": _NOT_NEGATIVE,
    "beta2_decay": Rule("number", low=-_LARGEST, high=0),
    "d": Rule("number", low=1, high=_LARGEST),
    "etas": Rule("pair", low=0, open_low=True, high=_LARGEST),
    "step_sizes": Rule("pair", low=0, open_low=True, high=_LARGEST),
    "max_coeff": _POSITIVE,
    "min_coeff": _POSITIVE,
    "amsgrad": _FLAG,
    "nesterov": _FLAG,
    "centered": _FLAG,
    "maximize": Rule("flag", refused="it climbs the loss instead of descending it. Remove it.", unless=(False,)),
    "capturable": Rule("flag", refused="it is for CUDA graphs, and dsaux records none. Remove it.", unless=(False,)),
    "differentiable": Rule("flag", refused="nothing differentiates through a step here. Remove it.", unless=(False,)),
    "decoupled_weight_decay": _FLAG,
    "foreach": _FLAG_OR_NULL,
    "fused": _FLAG_OR_NULL,
    "bias_correction": _FLAG,
    "set_grad_none": _FLAG,
    "eps_inside_sqrt": _FLAG,
    "torch_adam": _FLAG,
    "adam_w_mode": _FLAG,
    "fp32_optimizer_states": _FLAG_OR_NULL,
}
# Adafactor alone writes eps as a pair, whose first number may be null; dsaux.config_deepspeed checks it.
ADAFACTOR_EPS = Rule("any", text="a list [number or null, number]")
ADAFACTOR_EPS_PAIR = (Rule("number", low=0, high=_LARGEST, null=True), _NOT_NEGATIVE)
AMSGRAD_REFUSED = Rule("flag", refused="DeepSpeed's fused optimizers have no AMSGrad. Remove it.", unless=(False,))

_STEPS = Rule("int", low=1)
_WARMUP_TYPE = Rule("text", choices=("log", "linear"))
_LAST = Rule("int", low=-1)
_TOTAL = Rule("int", low=1, also=("auto",))
_WARMUP_LR: Mapping[str, Rule] = {
    "warmup_min_lr": _NOT_NEGATIVE,
    "warmup_max_lr": _POSITIVE,
    "warmup_num_steps": _STEPS,
    "warmup_type": _WARMUP_TYPE,
    "last_batch_iteration": _LAST,
}

SCHEDULERS: Mapping[str, Mapping[str, Rule]] = {
    "WarmupLR": {**_WARMUP_LR, "warmup_max_lr": Rule("number", low=0, open_low=True, high=_LARGEST, null=True)},
    "WarmupDecayLR": {"total_num_steps": _TOTAL, **_WARMUP_LR},
    "WarmupCosineLR": {
        "total_num_steps": _TOTAL,
        "warmup_min_ratio": Rule("number", low=0, high=1),
        "warmup_num_steps": _STEPS,
        "cos_min_ratio": Rule("number", low=0, high=1),
        "warmup_type": _WARMUP_TYPE,
        "last_batch_iteration": _LAST,
    },
    "OneCycle": {
        "cycle_min_lr": _NOT_NEGATIVE,
        "cycle_max_lr": _POSITIVE,
        "decay_lr_rate": _NOT_NEGATIVE,
        "cycle_first_step_size": _STEPS,
        "cycle_second_step_size": Rule("int", low=0, null=True),
        "cycle_first_stair_count": Rule("int", low=0),
        "cycle_second_stair_count": Rule("int", low=0, null=True),
        "decay_step_size": Rule("int", low=0),
        "cycle_momentum": _FLAG,
        "cycle_min_mom": _BELOW_ONE,
        "cycle_max_mom": _BELOW_ONE,
        "decay_mom_rate": _NOT_NEGATIVE,
        "last_batch_iteration": _LAST,
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": _POSITIVE,
        "lr_range_test_step_size": _STEPS,
        "lr_range_test_step_rate": _POSITIVE,
        "lr_range_test_staircase": _FLAG,
        "last_batch_iteration": _LAST,
    },
}

# Parameters without which a schedule fails, or would silently replace the optimizer's learning rate.
SCHEDULER_REQUIRED: Mapping[str, Mapping[str, str]] = {
    "WarmupDecayLR": {
        "total_num_steps": 'Set it to "auto" (the run\'s own number of steps) or to a whole number.',
        "warmup_max_lr": "Without it DeepSpeed climbs to 0.001, whatever optimizer.params.lr says. Set it to that lr.",
    },
    "WarmupCosineLR": {"total_num_steps": 'Set it to "auto" (the run\'s own number of steps) or to a whole number.'},
    "OneCycle": {
        "cycle_min_lr": "Set it to the learning rate at both ends of the cycle.",
        "cycle_max_lr": "Set it to the learning rate at the top of the cycle.",
    },
}
DEFAULT_WARMUP_STEPS = 1000
LEAST_WARMUP_STEPS = 2
"""DeepSpeed takes a warm-up of one step as one of two."""
SCHEDULER_ORDER: tuple[tuple[str, str], ...] = (
    ("warmup_min_lr", "warmup_max_lr"),
    ("cycle_min_lr", "cycle_max_lr"),
    ("cycle_min_mom", "cycle_max_mom"),
)
