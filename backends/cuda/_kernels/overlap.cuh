// Kernels of one stream that overlap: a launch with `overlap` may begin before the kernel ahead ends.
// Without it both functions do nothing.

#pragma once

// Lets the next kernel have what processors are free or become so. Its blocks crowd on the first ones:
// only for kernels whose blocks all run at once, or before a kernel whose blocks fill a processor.
__device__ __forceinline__ void let_next_kernel_begin() {
    asm volatile("griddepcontrol.launch_dependents;");
}

// Waits for the kernel before this one on the stream to end; before anything of others is read or
// written. Some thread of every block calls it, or else the next kernel's wait is none for the one
// before this.
__device__ __forceinline__ void wait_for_kernel_ahead() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}
