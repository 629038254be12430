from stego_backbones import main

main()
