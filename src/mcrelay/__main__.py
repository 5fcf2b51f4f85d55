"""python -m mcrelay"""

from mcrelay.cli import main

main()
