//go:build !linux

package main

// hideInput: on other systems, the terminal shows what is typed until the secret is read.
func hideInput(int) {}
