"""Several devices and several processes: meshes, shardings, and what they must agree on."""
