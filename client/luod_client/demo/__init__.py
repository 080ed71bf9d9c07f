"""luod's whole story on this machine, on real data, in seconds.

`story` directs it, `client` plays the replaced process before and after, `peer` is somebody who waits for an answer, `looper` watches
the pause from outside, `device` stands in for a vfio device, `checks` compares. Each role is a process of its own.
"""
