"""`asft data sae` and `asft data features`."""

from asft_kernels.methods.fpo import features_command, sae_command

COMMANDS = {"sae": sae_command, "features": features_command}
