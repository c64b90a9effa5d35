//go:build race

package netstack

const racing = true
