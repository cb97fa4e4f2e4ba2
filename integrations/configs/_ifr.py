"""What all configurations of this folder share; each inherits it beside mmdet's own."""

custom_imports = dict(imports=["ifr_fast.integrations.mmdet"], allow_failed_imports=False)
# The authors' warm-up. README.md, beside this folder, says when to leave it out.
custom_hooks = [dict(type="IFRHook", warmup_iters=2000)]
