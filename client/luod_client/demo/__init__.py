"""luod's whole story on this machine, on real data, in seconds.

`story` directs it, `client` plays the replaced process before and after, `peer` is somebody who waits for an answer, `looper` watches
the pause from outside, `device` stands in for a vfio device, `checks` compares. `guest` plays the virtual machine monitor that is replaced
under its guest: `kvm` is the machine, `counting` what runs in it. Each role is a process of its own.

`passthrough` is another story, of a real device or QEMU's, in two examples: `vfio` is how it is had, `edu` the device.
"""
