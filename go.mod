module github.com/sluice-proxy/sluice

go 1.26.0

require golang.org/x/sys v0.49.0

require (
	github.com/goccy/go-yaml v1.19.2
	github.com/pires/go-proxyproto v0.15.0
)
