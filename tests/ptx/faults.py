"""What stops a kernel in the emulator."""


class Fault(Exception):
    """What the hardware would not do, or not define."""


class Unknown(Fault):
    """PTX that the emulator has not learned."""
