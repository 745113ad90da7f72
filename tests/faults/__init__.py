"""Faults, put into whole conversions: killed, power lost, disk full, files that vanish.

A helper process (``zygote``) imports everything once and forks a child for each run. In the child
every operation that changes a file goes through ``operations``, is counted, and at one of them
``inject`` kills the process, cuts the power (``power`` says what is then left on the disk) or makes
the operation fail. ``scenes`` are whole runs with what must hold afterwards; ``campaign`` loops.

What is not seen: writes by Rust, which are one operation each (``safetensors.serialize_file``, in
the cache only), and shared memory maps, of which there are none. ``system`` proves with strace that
nothing else is missing.
"""
