"""Keys of a model file that kinds of layers add, one file each: a mixin of fields, and the flags that say the same."""
