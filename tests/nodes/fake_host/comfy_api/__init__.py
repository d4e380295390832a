"""A stand-in for ComfyUI's `comfy_api`: the few names that the nodes use, strict about arguments. See latest/."""
