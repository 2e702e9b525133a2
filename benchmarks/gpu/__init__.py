"""What a CUDA machine is asked in a few minutes: `python scripts/gpu_check.py --call 1|2|3 --out DIR`.

jobs          processes with a time limit each, and what they report, line by line
cases         the models that the tests and the calls train
compiling     call 1: every kernel that is needed, compiled in parallel into Triton's cache
correctness   call 1: tests in groups, and which switch mends a group that fails
floors        call 1: each kernel's time beside the least that it could take
outcomes      a plugin of pytest: one line a test
partners      calls 2 and 3: contestants in processes of their own, which take turns
comparison    call 2: fastmono beside its peers
tuning        call 3: other launch settings, and what the profiler says of the kernels
report        one page a call
"""
