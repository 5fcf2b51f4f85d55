"""What mcrelay asks of the kernel's network: privileged sockets, interface facts."""
