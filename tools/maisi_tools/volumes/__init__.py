"""The door: finding, reading, checking and writing volumes, and the voxel grids between them."""
